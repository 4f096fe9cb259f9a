"""Write train.en and train.de: the hand-written captions, then captions drawn from a grammar.

    python assets/captions/make_captions.py            # write both files beside this one
    python assets/captions/make_captions.py --check    # exit 1 where they are not what it writes

The grammar is a lexicon (the tables below) and 21 sentence shapes (the functions of SHAPES). German
endings come from two tables, ARTICLES and ENDINGS; the order of words comes from three functions:
`main_clause` (verb second), `inverted` (something else first, then the verb) and `subordinate`
(verb last). A slot takes only words that make sense in it: animals have verbs of their own, an
activity lists its places, a noun lists its adjectives.

Adjectives are stems to which an ending is added, so those that change their stem (dunkel, teuer,
hoch) or take no ending (rosa, lila) are left out of the lexicon. A drawn caption is refused when
either sentence is there already, in any file, or when it has the frame (see `frame`) of a sentence
of the validation or test captions. So those files are inputs: after a change, run this again.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SEED = 42
DRAWN = 1130
FRAME_TOKENS = 7
TRIES = 200_000

# Columns: masculine, feminine, neuter, plural.
ARTICLES = {
    "definite": {
        "nominative": "der die das die",
        "accusative": "den die das die",
        "dative": "dem der dem den",
    },
    "indefinite": {
        "nominative": "ein eine ein",
        "accusative": "einen eine ein",
        "dative": "einem einer einem",
    },
}
ENDINGS = {
    "definite": {"nominative": "e e e en", "accusative": "en e e en", "dative": "en en en en"},
    "indefinite": {"nominative": "er e es", "accusative": "en e es", "dative": "en en en"},
    "none": {"nominative": "er e es e", "accusative": "en e es e", "dative": "em er em en"},
}
RELATIVE = {"m": "der", "f": "die", "n": "das", "p": "die"}
HIS = {"m": ("his", "sein"), "f": ("her", "ihr"), "n": ("its", "sein"), "p": ("their", "ihr")}
COUNTS = {"two": "zwei", "three": "drei", "four": "vier", "several": "mehrere", "some": "einige"}

# English=German stem.
ADJECTIVES = """
red=rot blue=blau green=grün yellow=gelb black=schwarz white=weiß brown=braun gray=grau
colorful=bunt young=jung old=alt elderly=älter small=klein little=klein big=groß large=groß
tall=groß long=lang heavy=schwer new=neu blond=blond wet=nass
"""
COLORS = "red blue green yellow black white brown gray"

# English, its plural, German, gender, its plural, form of a weak noun outside the nominative,
# groups, adjectives. A group named twice is drawn twice as often; * stands for the colors.
NOUNS = """
man|men|Mann|m|Männer||adult adult adult male|young old tall
woman|women|Frau|f|Frauen||adult adult adult female|young old blond
gentleman|gentlemen|Herr|m|Herren|Herrn|adult male|elderly
tourist|tourists|Tourist|m|Touristen|Touristen|adult|young
student|students|Student|m|Studenten|Studenten|adult|young
worker|workers|Arbeiter|m|Arbeiter||adult|young old
farmer|farmers|Bauer|m|Bauern|Bauern|adult|young old
teacher|teachers|Lehrerin|f|Lehrerinnen||adult female|young
boy|boys|Junge|m|Jungen|Jungen|child child child|little small blond
girl|girls|Mädchen|n|Mädchen||child child child girl|little small blond
child|children|Kind|n|Kinder||child child|little small
dog|dogs|Hund|m|Hunde||dog dog dog pet|black white brown small big wet
puppy|puppies|Welpe|m|Welpen|Welpen|dog|black white brown small
cat|cats|Katze|f|Katzen||cat pet|black white gray small
horse|horses|Pferd|n|Pferde||hoof hoof led|black white brown big young
cow|cows|Kuh|f|Kühe||hoof led|brown white young
goat|goats|Ziege|f|Ziegen||hoof led|white brown small
donkey|donkeys|Esel|m|Esel||hoof led|gray brown old
bird|birds|Vogel|m|Vögel||bird|black white small colorful
duck|ducks|Ente|f|Enten||duck|white brown small
monkey|monkeys|Affe|m|Affen|Affen|monkey|small brown young
book|books|Buch|n|Bücher||text shown|old big
newspaper|newspapers|Zeitung|f|Zeitungen||text|old
letter|letters|Brief|m|Briefe||text shown|long
magazine|magazines|Zeitschrift|f|Zeitschriften||text|old
photo|photos|Foto|n|Fotos||shown|old
ball|balls|Ball|m|Bälle||thrown mouth given|red blue yellow big small
stick|sticks|Stock|m|Stöcke||mouth mouth thrown|long big
shoe|shoes|Schuh|m|Schuhe||mouth|old brown red
toy|toys|Spielzeug|n|Spielzeuge||mouth given|small red
umbrella|umbrellas|Regenschirm|m|Regenschirme||held held|* colorful
balloon|balloons|Luftballon|m|Luftballons||held given|red blue yellow big
flag|flags|Fahne|f|Fahnen||held|red white big colorful
sign|signs|Schild|n|Schilder||held|big white small
flower|flowers|Blume|f|Blumen||held given given|red yellow white
camera|cameras|Kamera|f|Kameras||held|black small old
lantern|lanterns|Laterne|f|Laternen||held|small red
bag|bags|Tasche|f|Taschen||carried|heavy black brown red
box|boxes|Kiste|f|Kisten||carried|heavy big small
basket|baskets|Korb|m|Körbe||carried|big heavy small
suitcase|suitcases|Koffer|m|Koffer||carried|heavy old red black
ladder|ladders|Leiter|f|Leitern||carried|long
bicycle|bicycles|Fahrrad|n|Fahrräder||repaired parked parked landmark|* old new
car|cars|Auto|n|Autos||repaired washed parked landmark|* old new
truck|trucks|Lastwagen|m|Lastwagen||washed parked landmark|* old big
motorcycle|motorcycles|Motorrad|n|Motorräder||repaired washed parked|* old
bus|buses|Bus|m|Busse||washed parked landmark|red yellow white
tractor|tractors|Traktor|m|Traktoren||repaired washed parked|red green old
fence|fences|Zaun|m|Zäune||painted landmark fence obstacle|white brown old
door|doors|Tür|f|Türen||painted landmark|* old
wall|walls|Mauer|f|Mauern||painted landmark obstacle|white gray old
log|logs|Baumstamm|m|Baumstämme||obstacle|big old
boat|boats|Boot|n|Boote||painted repaired|white blue old small
house|houses|Haus|n|Häuser||landmark landmark seen|red blue yellow white old big
church|churches|Kirche|f|Kirchen||landmark seen|old small white
fountain|fountains|Brunnen|m|Brunnen||landmark seen|old big
statue|statues|Statue|f|Statuen||landmark seen|old white large
bridge|bridges|Brücke|f|Brücken||seen|old long
tower|towers|Turm|m|Türme||seen|old
tent|tents|Zelt|n|Zelte||landmark|* big
store|stores|Laden|m|Läden||landmark|small
tree|trees|Baum|m|Bäume||landmark|large old
window|windows|Fenster|n|Fenster||cleaned|large small
mirror|mirrors|Spiegel|m|Spiegel||cleaned|large old
son|sons|Sohn|m|Söhne||kin|little
daughter|daughters|Tochter|f|Töchter||kin|little
table|tables|Tisch|m|Tische||cleaned|large long
stroller|strollers|Kinderwagen|m|Kinderwagen||pushed|blue black
wheelbarrow|wheelbarrows|Schubkarre|f|Schubkarren||pushed|heavy old green
cart|carts|Karren|m|Karren||pushed pulled|heavy old
kite|kites|Drachen|m|Drachen||flown|* colorful
sandcastle|sandcastles|Sandburg|f|Sandburgen||sand|big small
snowman|snowmen|Schneemann|m|Schneemänner||snow|big small
apple|apples|Apfel|m|Äpfel||eaten given|red green
banana|bananas|Banane|f|Bananen||eaten|
sandwich|sandwiches|Sandwich|n|Sandwiches||eaten|big
coat|coats|Mantel|m|Mäntel||in|*
jacket|jackets|Jacke|f|Jacken||in in|*
shirt|shirts|Hemd|n|Hemden||in in|*
sweater|sweaters|Pullover|m|Pullover||in|*
vest|vests|Weste|f|Westen||in|red yellow green black
dress|dresses|Kleid|n|Kleider||skirt skirt|* long colorful
skirt|skirts|Rock|m|Röcke||skirt|* long
hat|hats|Hut|m|Hüte||with|* big
cap|caps|Mütze|f|Mützen||with|*
scarf|scarves|Schal|m|Schals||with|* long colorful
helmet|helmets|Helm|m|Helme||with|red blue white yellow
backpack|backpacks|Rucksack|m|Rucksäcke||with|* heavy big
"""

# Letter, English, German.
PLACES = """
s|on the street|auf der Straße
p|in the park|im Park
q|in a town square|auf einem Marktplatz
w|on the sidewalk|auf dem Gehweg
m|at the market|auf dem Markt
b|on the beach|am Strand
e|in a meadow|auf einer Wiese
f|in the forest|im Wald
l|by a lake|an einem See
r|by the river|am Fluss
g|in the garden|im Garten
n|in the snow|im Schnee
d|in a field|auf einem Feld
y|in the yard|im Hof
k|in the kitchen|in der Küche
v|in the living room|im Wohnzimmer
c|in a café|in einem Café
o|in a restaurant|in einem Restaurant
t|at the train station|am Bahnhof
h|in a workshop|in einer Werkstatt
a|on a stage|auf einer Bühne
x|in a classroom|in einem Klassenzimmer
B|on a bench|auf einer Bank
S|on the stairs|auf der Treppe
T|at a table|an einem Tisch
F|by a campfire|an einem Lagerfeuer
"""
SEATS = """
on a bench|auf einer Bank
on the stairs|auf der Treppe
at a table|an einem Tisch
by a campfire|an einem Lagerfeuer
in the grass|im Gras
on a blanket|auf einer Decke
under a tree|unter einem Baum
on a low wall|auf einer niedrigen Mauer
in front of a tent|vor einem Zelt
on the floor|auf dem Boden
"""

# Who, English verb and what follows it, German verb and what follows it, separable prefix, places.
# Who: a adult, c child; 2 only in the plural; - too short for a main clause. "x~y": x in the
# singular, y in the plural. @group draws an object, put at @ in the accusative or at + in the
# dative; @group* follows the number of the subject. Places are letters of PLACES, or none.
ACTIVITIES = """
ac|read reads reading|@text*|liest lesen|@||pbglvBSt
ac|play plays playing|the guitar|spielt spielen|Gitarre||spqbgBSFa
ac|play plays playing|the violin|spielt spielen|Geige||sqaxv
a|play plays playing|the accordion|spielt spielen|Akkordeon||sqmBt
ac2|play play playing|soccer|spielt spielen|Fußball||spbeyn
ac2|play play playing|volleyball|spielt spielen|Volleyball||pbe
ac2|play play playing|cards|spielt spielen|Karten||cvTFp
a2|play play playing|chess|spielt spielen|Schach||pcBT
c|play plays playing|with @thrown|spielt spielen|mit +||pbegysn
c|build builds building|@sand|baut bauen|@||b
c|build builds building|@snow|baut bauen|@||gpy
ac|fly flies flying|@flown*|lässt lassen|@ steigen||beld
ac|ride rides riding|a bicycle~bicycles|fährt fahren|Fahrrad||spbfy
c|ride rides riding|a skateboard~skateboards|fährt fahren|Skateboard||swpq
a|ride rides riding|a motorcycle~motorcycles|fährt fahren|Motorrad||s
ac|dance dances dancing||tanzt tanzen|||spqbaF
ac|sing sings singing||singt singen|||sqaxF
ac|sleep sleeps sleeping||schläft schlafen|||Bbt
ac|wait waits waiting|for the bus|wartet warten|auf den Bus||sw
ac|eat eats eating|@eaten*|isst essen|@||pkgBSbT
ac|eat eats eating|an ice cream~ice cream|isst essen|ein Eis~Eis||spqbB
a|drink drinks drinking|a cup of coffee~coffee|trinkt trinken|eine Tasse Kaffee~Kaffee||kcotTgB
ac|drink drinks drinking|a glass of water~water|trinkt trinken|ein Glas Wasser~Wasser||koT
ac|hold holds holding|@held*|hält halten|@ in der Hand~@ in den Händen||sqp
a|carry carries carrying|@carried|trägt tragen|@||syt
ac|throw throws throwing|@thrown|wirft werfen|@||pbe
a|repair repairs repairing|@repaired|repariert reparieren|@||yh
a|wash washes washing|@washed|wäscht waschen|@||ys
ac|paint paints painting|@painted|streicht streichen|@||
ac|clean cleans cleaning|@cleaned|putzt putzen|@||
a|push pushes pushing|@pushed|schiebt schieben|@ vor sich|her|
ac|take takes taking|a picture of @seen|fotografiert fotografieren|@||
a|sell sells selling|fruit and vegetables|verkauft verkaufen|Obst und Gemüse||msq
a|sell sells selling|flowers|verkauft verkaufen|Blumen||msqt
a|cook cooks cooking|soup|kocht kochen|eine Suppe||kF
ac|bake bakes baking|a cake|backt backen|einen Kuchen||k
a|water waters watering|the flowers|gießt gießen|die Blumen||g
ac|pick picks picking|apples|pflückt pflücken|Äpfel||g
ac|feed feeds feeding|the ducks|füttert füttern|die Enten||lrp
a2|talk talk talking||redet reden|miteinander||spcmtBST
ac2|laugh laugh laughing||lacht lachen|||pcBbT
ac|draw draws drawing|a picture~pictures|malt malen|ein Bild~Bilder||pxBTg
a|shovel shovels shoveling|snow|schaufelt schaufeln|Schnee||syw
ac|jump jumps jumping|into the water|springt springen|ins Wasser||
ac|walk walks walking|down the street|geht gehen|die Straße|entlang|
ac|run runs running|along the beach|läuft laufen|den Strand|entlang|
ac|climb climbs climbing|up a rock|klettert klettern|auf einen Felsen||
ac|cross crosses crossing|a busy street|überquert überqueren|eine belebte Straße||
ac|get gets getting|off the bus|steigt steigen|aus dem Bus|aus|
ac-|watch watches watching||sieht sehen||zu|
ac|look looks looking|out of the window|schaut schauen|aus dem Fenster||
"""
# As above; who is a group of animals.
ANIMALS = """
dog|run runs running|through the snow|rennt rennen|durch den Schnee||
dog|run runs running|across a meadow|rennt rennen|über eine Wiese||
dog|run runs running|along the beach|rennt rennen|am Strand|entlang|
dog|jump jumps jumping|over @obstacle|springt springen|über @||
dog|jump jumps jumping|into the water|springt springen|ins Wasser||
dog|chase chases chasing|@thrown|jagt jagen|+|nach|
dog|swim swims swimming|across a lake|schwimmt schwimmen|durch einen See||
dog|dig digs digging|a hole|gräbt graben|ein Loch||bgn
dog cat|sleep sleeps sleeping||schläft schlafen|||vgBk
cat|sit sits sitting|on the roof of a house|sitzt sitzen|auf dem Dach eines Hauses||
cat|watch watches watching|@bird|beobachtet beobachten|@||g
cat|climb climbs climbing|up a tree|klettert klettern|auf einen Baum||
cat dog|drink drinks drinking|water from a bowl|trinkt trinken|Wasser aus einer Schüssel||ky
hoof|stand stands standing|behind @fence|steht stehen|hinter +||
hoof|graze grazes grazing||grast grasen|||erl
hoof|pull pulls pulling|@pulled|zieht ziehen|@||sd
hoof|walk walks walking|across a field|läuft laufen|über ein Feld||
bird duck|fly flies flying|over the lake|fliegt fliegen|über den See||
bird|sit sits sitting|on a branch|sitzt sitzen|auf einem Ast||fg
bird duck|look looks looking|for food|sucht suchen|nach Futter||bpne
monkey|climb climbs climbing|up a tree|klettert klettern|auf einen Baum||
monkey|eat eats eating|@eaten*|frisst fressen|@||
"""
TIMES = (
    ("on a sunny day", "an einem sonnigen Tag"),
    ("on a warm summer evening", "an einem warmen Sommerabend"),
    ("early in the morning", "früh am Morgen"),
    ("in the evening", "am Abend"),
)
PREPOSITIONS = (("in front of", "vor"), ("next to", "neben"), ("behind", "hinter"))
LOOKS = (
    ("long hair", "langen Haaren"),
    ("blond hair", "blonden Haaren"),
    ("curly hair", "lockigen Haaren"),
    ("short hair", "kurzen Haaren"),
    ("glasses", "Brille"),
    ("a beard", "Bart"),
)
# Group of the thing, English participle phrase, German one.
PASSIVES = (
    ("led", "led across a meadow", "über eine Wiese geführt"),
    ("led", "led down the street", "die Straße entlanggeführt"),
    ("pet", "stroked", "gestreichelt"),
    ("pet", "photographed", "fotografiert"),
    ("washed", "washed", "gewaschen"),
    ("repaired", "repaired", "repariert"),
    ("painted", "painted", "gestrichen"),
    ("pushed", "pushed up a hill", "einen Hügel hinaufgeschoben"),
)
# English, German verb and what follows it, English purpose, group or noun of its object, German
# purpose.
PURPOSES = (
    ("climbing a ladder", "steigt steigen", "auf eine Leiter", "clean", "window", "zu putzen"),
    ("climbing a ladder", "steigt steigen", "auf eine Leiter", "paint", "wall", "zu streichen"),
    ("kneeling down", "kniet knien", "sich hin", "photograph", "flower", "zu fotografieren"),
    ("bending down", "bückt bücken", "sich", "pick up", "thrown", "aufzuheben"),
    ("stopping", "bleibt bleiben", "stehen", "photograph", "seen", "zu fotografieren"),
    ("stretching", "streckt strecken", "sich", "pick", "apple", "zu pflücken"),
)
# English, German verb, its prefix, groups of what is handed over.
GIVING = (
    ("showing", "zeigt zeigen", "", "shown"),
    ("handing", "reicht reichen", "", "given"),
    ("giving", "gibt geben", "", "given"),
    ("reading", "liest lesen", "vor", "letter book"),
)
THE_GIVING = (
    ("throwing", "wirft", "zu", "thrown"),
    ("giving", "gibt", "", "given"),
    ("showing", "zeigt", "", "shown"),
)
# English, German verb, its prefix, letters of the places.
OUTINGS = (
    ("walking", "geht", "spazieren", "pbefl"),
    ("playing", "spielt", "", "pbgeny"),
    ("sitting", "sitzt", "", "BSvg"),
    ("running", "rennt", "", "bpe"),
)
FUNCTION_WORDS = """
a an the this that these those his her its their some any each other another one's and or but
while as when who which what whose where to of in on at by for from with without into onto over
under across along through between behind beside near next front down up out off around above
below against toward towards during after before inside outside past is are was were be been
being am has have had do does did not no there it he she they him them himself herself itself
themselves than so if because about like
"""


class Noun(NamedTuple):
    """A noun in both languages; `oblique` is the singular of a weak noun outside the nominative."""

    english: str
    english_plural: str
    german: str
    gender: str
    german_plural: str
    oblique: str
    groups: list[str]
    adjectives: list[str]


class Phrase(NamedTuple):
    """A noun phrase in both languages, and what agrees with it: gender m, f, n, or p for plural."""

    en: str
    de: str
    gender: str
    noun: Noun


class Clause(NamedTuple):
    """What a subject does; the verb agrees with the subject, the order of words is still open.

    `en` maps simple, progressive and participle to the English predicate; `verb`, `middle` and
    `prefix` are the German one; `place` is (English, German), both empty where there is none.
    """

    en: dict[str, str]
    verb: str
    middle: str
    prefix: str
    place: tuple[str, str]


def read_noun(line: str) -> Noun:
    """Parse one line of NOUNS."""
    *forms, groups, adjectives = line.split("|")
    return Noun(*forms, groups.split(), adjectives.replace("*", COLORS).split())


def read_table(text: str) -> list[list[str]]:
    """Parse a table of one row a line, with columns between bars."""
    return [line.split("|") for line in text.strip().splitlines()]


LEXICON = {noun.english: noun for noun in map(read_noun, NOUNS.strip().splitlines())}
PLACE = {letter: (english, german) for letter, english, german in read_table(PLACES)}
SEAT = read_table(SEATS)
FRAME_WORDS = frozenset(FUNCTION_WORDS.split())
STEM = dict(pair.split("=") for pair in ADJECTIVES.split())
ACTS = read_table(ACTIVITIES)
ANIMAL_ACTS = read_table(ANIMALS)


def inflect(noun: Noun, case: str, plural: bool = False) -> str:
    """Decline a German noun; the dative plural adds -n unless the plural ends in -n or -s."""
    if not plural:
        return noun.german if case == "nominative" else noun.oblique or noun.german
    form = noun.german_plural
    return form + "n" if case == "dative" and form[-1] not in "ns" else form


def noun_phrase(
    noun: Noun, case: str, determiner: str, adjective: str = "", plural: bool = False
) -> str:
    """Decline a German article, adjective and noun together.

    Args:
        noun: the noun.
        case: nominative, accusative or dative.
        determiner: definite, indefinite, or none (also after a number, which stays outside).
        adjective: stem of a German adjective, or nothing.
        plural: whether the phrase is in the plural.

    Returns:
        The phrase, such as "einem kleinen Jungen".

    Raises:
        ValueError: the indefinite article is asked for in the plural.
    """
    if plural and determiner == "indefinite":
        raise ValueError(f'"{noun.german}" has no indefinite plural; use the determiner "none"')
    column = 3 if plural else "mfn".index(noun.gender)
    article = ARTICLES[determiner][case].split()[column] if determiner in ARTICLES else ""
    ending = ENDINGS[determiner][case].split()[column]
    return join(article, adjective and adjective + ending, inflect(noun, case, plural))


def join(*parts: str) -> str:
    """Join the parts that are not empty with blanks."""
    return " ".join(part for part in parts if part)


def phrase(noun: Noun, case: str, count: str, adjective: str) -> Phrase:
    """Make a noun phrase in both languages; the arguments are those of `draw`."""
    plural = count not in ("a", "the")
    english = join(adjective, noun.english_plural if plural else noun.english)
    determiner = {"a": "indefinite", "the": "definite"}.get(count, "none")
    german = noun_phrase(noun, case, determiner, STEM.get(adjective, ""), plural)
    number = COUNTS.get(count, "")
    if case == "dative" and number.endswith("e"):
        number += "n"
    article = "an" if count == "a" and english[0] in "aeiou" else count
    return Phrase(
        join(article, english), join(number, german), "p" if plural else noun.gender, noun
    )


def draw(
    rng: random.Random, group: str, case: str, count: str = "a", adjective: str | None = None
) -> Phrase:
    """Draw a noun of a group and make a phrase of it.

    Args:
        rng: the source of chance.
        group: the group of the noun, or an English noun.
        case: the case of the German phrase.
        count: a, the, a key of COUNTS, or nothing for a bare plural.
        adjective: the English adjective; by default often one of those of the noun.

    Returns:
        The phrase.
    """
    nouns = [noun for noun in LEXICON.values() for name in noun.groups if name == group]
    noun = rng.choice(nouns or [LEXICON[group]])
    if adjective is None:
        adjective = rng.choice(noun.adjectives) if noun.adjectives and rng.random() < 0.6 else ""
    return phrase(noun, case, count, adjective)


def person(rng: random.Random, case: str = "nominative", count: str | None = None) -> Phrase:
    """Draw a person or, one time in three unless a count is given, several."""
    if count is None:
        count = rng.choice(list(COUNTS)) if rng.random() < 0.33 else "a"
    return draw(rng, rng.choice(("adult", "adult", "child")), case, count)


def clothes(rng: random.Random, wearer: Phrase, case: str, count: str = "a") -> Phrase:
    """Draw something colored to wear, in the plural where the wearers are several."""
    skirts = ["skirt"] if {"female", "girl"} & set(wearer.noun.groups) else []
    color = rng.choice(("red", "blue", "green", "yellow", "black", "white"))
    count = "" if wearer.gender == "p" else count
    return draw(rng, rng.choice(["in", "with", *skirts]), case, count, color)


def dress(rng: random.Random, subject: Phrase, count: str = "a") -> Phrase:
    """Add clothes to a subject: "Ein Mann in einem roten Mantel"."""
    worn = clothes(rng, subject, "dative", count)
    english, german = ("with", "mit") if "with" in worn.noun.groups else ("in", "in")
    after = f"{german} {worn.de}".replace("in dem ", "im ")
    return subject._replace(en=f"{subject.en} {english} {worn.en}", de=f"{subject.de} {after}")


def suits(who: str, subject: Phrase) -> bool:
    """Tell whether an activity of `who` (first column of its table) is one for this subject."""
    groups = subject.noun.groups
    if "adult" in groups or "child" in groups:
        return ("a" if "adult" in groups else "c") in who and (
            "2" not in who or subject.gender == "p"
        )
    return bool(set(who.split()) & set(groups))


def act_of(
    rng: random.Random, subject: Phrase, placed: bool = False, aside: bool = False
) -> list[str]:
    """Draw an activity that suits a subject.

    Args:
        rng: the source of chance.
        subject: who does it.
        placed: only an activity that has places.
        aside: short ones ("zusehen") are welcome too, as the clause will be a subordinate one.

    Returns:
        A row of ACTIVITIES or ANIMALS.
    """
    people = {"adult", "child"} & set(subject.noun.groups)
    acts = [act for act in (ACTS if people else ANIMAL_ACTS) if suits(act[0], subject)]
    acts = [act for act in acts if (act[6] or not placed) and (aside or "-" not in act[0])]
    short = [act for act in acts if "-" in act[0]]
    return rng.choice(acts + 4 * short)


def fill(rng: random.Random, act: list[str], plural: bool) -> tuple[str, str]:
    """Choose the number of what follows the verb, and draw its object."""
    english, german = (part.split("~")[-1 if plural else 0] for part in (act[2], act[4]))
    if "@" not in english:
        return english, german
    before, slot = english.split("@")
    case = "dative" if "+" in german else "accusative"
    thing = draw(rng, slot.rstrip("*"), case, "" if plural and slot.endswith("*") else "a")
    return before + thing.en, german.replace("+", thing.de).replace("@", thing.de)


def clause(rng: random.Random, subject: Phrase, act: list[str], placed: bool = True) -> Clause:
    """Fill an activity: agreement, object and, if `placed` and it has any, a place."""
    plural = subject.gender == "p"
    base, third, ing = act[1].split()
    english, german = fill(rng, act, plural)
    verbs = {
        "simple": base if plural else third,
        "progressive": f"{'are' if plural else 'is'} {ing}",
        "participle": ing,
    }
    place = PLACE[rng.choice(act[6])] if placed and act[6] else ("", "")
    predicates = {style: join(verb, english) for style, verb in verbs.items()}
    return Clause(predicates, act[3].split()[plural], german, act[5], place)


def main_clause(subject: str, what: Clause) -> str:
    """Order a German main clause: subject, verb, place, the rest, separated prefix."""
    return join(subject, what.verb, what.place[1], what.middle, what.prefix)


def inverted(first: str, subject: str, what: Clause) -> str:
    """Order a German main clause that opens with something else: that, verb, subject, the rest."""
    place = "" if what.place[1] == first else what.place[1]
    return join(first, what.verb, subject, place, what.middle, what.prefix)


def subordinate(subject: str, what: Clause) -> str:
    """Order a German subordinate clause: the verb goes last, its prefix attached."""
    return join(subject, what.place[1], what.middle, what.prefix + what.verb)


def state(rng: random.Random, subject: Phrase, act: list[str]) -> tuple[str, str]:
    """Say that a subject does something; three English tenses share the German present."""
    style = rng.choice(("progressive", "progressive", "simple", "participle"))
    what = clause(rng, subject, act)
    return join(subject.en, what.en[style], what.place[0]), main_clause(subject.de, what)


def plain(rng: random.Random) -> tuple[str, str]:
    """A young man is reading a book in the park."""
    subject = person(rng)
    return state(rng, subject, act_of(rng, subject))


def too_warm(clothed: str, act: list[str]) -> bool:
    """Tell whether somebody so clothed would hardly do this: swim in a coat, cook in a helmet."""
    outdoors = any(word in clothed for word in ("coat", "helmet", "backpack", "scar", "hat"))
    return "into the water" in act[2] or (outdoors and bool(set("kvx") & set(act[6])))


def dressed(rng: random.Random) -> tuple[str, str] | None:
    """A woman in a red coat is waiting for the bus."""
    subject = dress(rng, person(rng))
    act = act_of(rng, subject)
    return None if too_warm(subject.en, act) else state(rng, subject, act)


def looks(rng: random.Random) -> tuple[str, str] | None:
    """A girl with long hair is drawing a picture."""
    subject, (english, german) = person(rng), rng.choice(LOOKS)
    if (german == "Bart" and "male" not in subject.noun.groups) or "blond" in subject.en:
        return None
    subject = subject._replace(en=f"{subject.en} with {english}", de=f"{subject.de} mit {german}")
    if subject.gender == "p" and german == "Bart":
        subject = subject._replace(en=subject.en.replace("a beard", "beards"))
    return state(rng, subject, act_of(rng, subject))


def wearing(rng: random.Random) -> tuple[str, str] | None:
    """A boy wearing a blue cap is flying a kite: in German a relative clause."""
    subject = person(rng)
    worn = clothes(rng, subject, "accusative")
    verb = "tragen" if subject.gender == "p" else "trägt"
    german = f"{subject.de}, {RELATIVE[subject.gender]} {worn.de} {verb},"
    subject = subject._replace(en=f"{subject.en} wearing {worn.en}", de=german)
    act = act_of(rng, subject)
    if too_warm(worn.en, act):
        return None
    what = clause(rng, subject, act)
    english = join(subject.en, what.en[rng.choice(("progressive", "simple"))], what.place[0])
    return english, main_clause(german, what)


def two_people(rng: random.Random) -> tuple[str, str] | None:
    """A man and a little girl are feeding the ducks."""
    one, other = person(rng, count="a"), person(rng, count="a")
    if one.noun == other.noun:
        return None
    younger = one if "child" in one.noun.groups else other
    both = Phrase(f"{one.en} and {other.en}", f"{one.de} und {other.de}", "p", younger.noun)
    return state(rng, both, act_of(rng, both))


def meanwhile(rng: random.Random) -> tuple[str, str] | None:
    """A man plays the guitar while two children dance."""
    subject, other = person(rng), person(rng)
    act, other_act = act_of(rng, subject), act_of(rng, other, aside=True)
    if subject.noun == other.noun or act[1] == other_act[1]:
        return None
    what, aside = clause(rng, subject, act, False), clause(rng, other, other_act, False)
    style = rng.choice(("progressive", "simple"))
    english = join(subject.en, what.en[style], "while", other.en, aside.en[style])
    return english, f"{main_clause(subject.de, what)}, während {subordinate(other.de, aside)}"


def place_first(rng: random.Random) -> tuple[str, str]:
    """In the park, an old woman is reading a newspaper."""
    subject = person(rng)
    what = clause(rng, subject, act_of(rng, subject, placed=True))
    english = f"{what.place[0]}, {subject.en} {what.en[rng.choice(('progressive', 'simple'))]}"
    return english, inverted(what.place[1], subject.de, what)


def time_first(rng: random.Random) -> tuple[str, str] | None:
    """On a sunny day, three children are building a sandcastle on the beach."""
    subject, (english, german) = person(rng), rng.choice(TIMES)
    what = clause(rng, subject, act_of(rng, subject, placed=True))
    if "sn" in what.en["simple"] + what.place[0] and german not in ("am Abend", "früh am Morgen"):
        return None
    english = join(f"{english},", subject.en, what.en["progressive"], what.place[0])
    return english, inverted(german, subject.de, what)


def animal(rng: random.Random) -> tuple[str, str]:
    """Two black dogs are running through the snow."""
    group = rng.choice(("dog", "dog", "dog", "cat", "hoof", "hoof", "bird", "duck", "monkey"))
    subject = draw(rng, group, "nominative", rng.choice(("a", "a", "a", "two", "three")))
    return state(rng, subject, act_of(rng, subject))


def in_its_mouth(rng: random.Random) -> tuple[str, str]:
    """A brown dog with a stick in its mouth is running across a meadow."""
    dog, thing = draw(rng, "dog", "nominative"), draw(rng, "mouth", "dative")
    english, german = f"{dog.en} with {thing.en} in its mouth", f"{dog.de} mit {thing.de} im Maul"
    ways = [act for act in ANIMAL_ACTS if act[0] == "dog" and act[1][:3] in ("run", "jum", "swi")]
    return state(rng, dog._replace(en=english, de=german), rng.choice(ways))


def landmark(rng: random.Random) -> tuple[str, str]:
    """Two tourists in blue jackets are standing in front of an old church."""
    subject = dress(rng, person(rng)) if rng.random() < 0.5 else person(rng)
    mark, (english, german) = draw(rng, "landmark", "dative"), rng.choice(PREPOSITIONS)
    row = rng.choice(("stand stands standing||steht stehen", "wait waits waiting||wartet warten"))
    act = ["", *row.split("|"), f"{german} {mark.de}", "", ""]
    act[2] = f"{english} {mark.en}"
    return state(rng, subject, act)


def parked(rng: random.Random) -> tuple[str, str] | None:
    """There is an old bicycle in front of a yellow house."""
    thing, mark = draw(rng, "parked", "nominative"), draw(rng, "landmark", "dative")
    if "parked" in mark.noun.groups:
        return None
    english, german = rng.choice(PREPOSITIONS)
    if rng.random() < 0.5:
        return f"there is {thing.en} {english} {mark.en}", f"{german} {mark.de} steht {thing.de}"
    return f"{thing.en} is parked {english} {mark.en}", f"{thing.de} steht {german} {mark.de}"


def passive(rng: random.Random) -> tuple[str, str]:
    """A white horse is being led across a meadow by a young woman."""
    group, english, german = rng.choice(PASSIVES)
    thing = draw(rng, group, "nominative")
    agent = draw(rng, "adult", "dative", rng.choice(("a", "a", "two")))
    german = f"{thing.de} wird von {agent.de} {german}"
    return f"{thing.en} is being {english} by {agent.en}", german


def spectators(rng: random.Random) -> tuple[str, str] | None:
    """Several people are watching a boy who is playing the violin."""
    crowd = rng.choice((("several people", "mehrere Leute"), ("many people", "viele Menschen")))
    watched = person(rng, "dative", rng.choice(("a", "a", "two")))
    act = act_of(rng, watched, placed=True)
    if act[1].split()[0] in ("sleep", "wait", "hold", "drink", "talk", "laugh", "eat"):
        return None
    what = clause(rng, watched, act)
    if what.place in (PLACE["v"], PLACE["k"]):
        return None
    english = join(crowd[0], "are watching", watched.en, "who", what.en["progressive"])
    german = f"{crowd[1]} sehen {watched.de} zu, {subordinate(RELATIVE[watched.gender], what)}"
    return join(english, what.place[0]), german


def purpose(rng: random.Random) -> tuple[str, str]:
    """A worker is climbing a ladder to clean a large window."""
    english, verbs, rest, aim, group, zu = rng.choice(PURPOSES)
    count = rng.choice(("a", "a", "two"))
    subject = draw(rng, "adult", "nominative", count) if "ladder" in english else person(rng)
    plural = subject.gender == "p"
    thing = draw(rng, group, "accusative")
    english = f"{subject.en} {'are' if plural else 'is'} {english} to {aim} {thing.en}"
    return english, f"{subject.de} {verbs.split()[plural]} {rest}, um {thing.de} {zu}"


def seated(rng: random.Random) -> tuple[str, str] | None:
    """A girl is sitting on a bench and reading a book."""
    subject, seat = person(rng), rng.choice(SEAT)
    act = act_of(rng, subject)
    if not set("BSTFx") & set(act[6]) or act[1].split()[0] in ("sleep", "dance"):
        return None
    what, plural = clause(rng, subject, act, False), subject.gender == "p"
    english = f"{subject.en} {'are' if plural else 'is'} sitting {seat[0]}"
    german = f"{subject.de} {'sitzen' if plural else 'sitzt'} {seat[1]}"
    return f"{english} and {what.en['participle']}", f"{german} und {main_clause('', what)}"


def giving(rng: random.Random) -> tuple[str, str] | None:
    """A woman is showing a small boy an old photo."""
    giver, taker = person(rng), person(rng, "dative", "a")
    if giver.noun == taker.noun:
        return None
    ing, verbs, prefix, groups = rng.choice(GIVING)
    thing = draw(rng, rng.choice(groups.split()), "accusative")
    plural = giver.gender == "p"
    english = f"{giver.en} {'are' if plural else 'is'} {ing} {taker.en} {thing.en}"
    return english, join(giver.de, verbs.split()[plural], taker.de, thing.de, prefix)


def the_giving(rng: random.Random) -> tuple[str, str] | None:
    """The boy in the red shirt is throwing the ball to the girl in the blue jacket."""
    cases = ("nominative", "dative")
    giver, taker = (draw(rng, "child", case, "the", "") for case in cases)
    if rng.random() < 0.5:
        giver, taker = (draw(rng, "adult", case, "the", "") for case in cases)
    if giver.noun == taker.noun:
        return None
    giver, taker = dress(rng, giver, "the"), dress(rng, taker, "the")
    ing, verb, prefix, group = rng.choice(THE_GIVING)
    thing = draw(rng, group, "accusative", "the", "")
    english = f"{giver.en} is {ing} {thing.en} to {taker.en}"
    return english, join(giver.de, verb, taker.de, thing.de, prefix)


def group_of(rng: random.Random) -> tuple[str, str] | None:
    """A group of tourists is waiting for the bus."""
    members = draw(rng, rng.choice(("adult", "child")), "dative", "", "")
    act = act_of(rng, members)
    if set("*~@") & set(act[2]):
        return None
    english, german = f"a group of {members.en}", f"eine Gruppe von {members.de}"
    return state(rng, Phrase(english, german, "f", members.noun), act)


def outing(rng: random.Random) -> tuple[str, str]:
    """A girl is walking in the park with her little dog."""
    subject = person(rng, count="a")
    ing, verb, prefix, places = rng.choice(OUTINGS)
    friend = draw(
        rng, rng.choice(("dog", "kin") if "adult" in subject.noun.groups else ("dog",)), "dative"
    )
    female = subject.gender == "f" or "girl" in subject.noun.groups
    his = "her" if female else "its" if subject.gender == "n" else "his"
    owner = "ihr" if subject.gender == "f" else "sein"
    place = PLACE[rng.choice(places)]
    english = f"{subject.en} is {ing} {place[0]} with {his} {friend.en.split(' ', 1)[1]}"
    return english, join(
        subject.de, verb, "mit", owner + friend.de.removeprefix("ein"), place[1], prefix
    )


def between(rng: random.Random) -> tuple[str, str] | None:
    """A small child is standing between an old man and a woman."""
    subject = draw(rng, rng.choice(("child", "dog", "adult")), "nominative")
    one, other = person(rng, "dative", "a"), person(rng, "dative", "a")
    if len({subject.noun.english, one.noun.english, other.noun.english}) < 3:
        return None
    ing, verb = rng.choice((("standing", "steht"), ("sitting", "sitzt"), ("walking", "läuft")))
    english = f"{subject.en} is {ing} between {one.en} and {other.en}"
    return english, f"{subject.de} {verb} zwischen {one.de} und {other.de}"


SHAPES: tuple[Callable[[random.Random], tuple[str, str] | None], ...] = (
    plain, dressed, looks, wearing, two_people, meanwhile, place_first, time_first, animal,
    in_its_mouth, landmark, parked, passive, spectators, purpose, seated, giving, the_giving,
    group_of, outing, between,
)  # fmt: skip


def frame(caption: str) -> str | None:
    """Reduce an English sentence to its frame.

    The frame is the lower-cased sentence without punctuation in which every word outside
    FUNCTION_WORDS (so also every number) is replaced by an underscore: "A man in a red coat is
    waiting at a bus stop." has the frame "a _ in a _ _ is _ at a _ _".

    Args:
        caption: an English caption.

    Returns:
        The frame, or None for sentences of fewer than FRAME_TOKENS words, whose frames say little.
    """
    words = [word.strip('.,;:!?"()') for word in caption.lower().split()]
    words = [word for word in words if word]
    if len(words) < FRAME_TOKENS:
        return None
    return " ".join(word if word in FRAME_WORDS else "_" for word in words)


def read_lines(folder: Path, name: str) -> list[str]:
    """Read the lines of a caption file."""
    return (folder / name).read_text(encoding="utf-8").splitlines()


def sentence(words: str) -> str:
    """Begin with a capital letter and end with a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def drawn_pairs(taken: set[str], frames: set[str | None]) -> list[tuple[str, str]]:
    """Draw DRAWN distinct captions.

    Args:
        taken: sentences of either language that are not to be drawn again.
        frames: frames of the captions held out, which are not to be drawn.

    Returns:
        Pairs (English, German), in the order drawn.

    Raises:
        RuntimeError: the grammar has too few captions outside `taken` and `frames`.
    """
    rng, pairs, taken = random.Random(SEED), [], set(taken)
    frames = frames - {None}
    for _ in range(TRIES):
        drawn = rng.choice(SHAPES)(rng)
        pair = tuple(map(sentence, drawn)) if drawn else None
        if pair and not taken & set(pair) and frame(pair[0]) not in frames:
            pairs.append(pair)
            taken |= set(pair)
        if len(pairs) == DRAWN:
            return pairs
    raise RuntimeError(
        f"{TRIES} tries gave {len(pairs)} captions, {DRAWN} expected; enlarge the lexicon"
    )


def train_texts(folder: Path) -> dict[str, str]:
    """Make the contents of train.en and train.de from the hand-written files of a folder."""
    parts = ("train_handwritten", "val", "test")
    files = {
        (part, tongue): read_lines(folder, f"{part}.{tongue}")
        for part in parts
        for tongue in ("en", "de")
    }
    taken = {line for lines in files.values() for line in lines}
    frames = {frame(line) for part in ("val", "test") for line in files[part, "en"]}
    pairs = drawn_pairs(taken, frames)
    texts = {}
    for column, tongue in enumerate(("en", "de")):
        lines = files["train_handwritten", tongue] + [pair[column] for pair in pairs]
        texts[f"train.{tongue}"] = "".join(f"{line}\n" for line in lines)
    return texts


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """Write the training captions, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write train.en and train.de beside this file.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the captions")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in train_texts(options.folder).items():
        path = options.folder / name
        if not options.check:
            write_whole(path, text)
        elif not path.is_file() or path.read_bytes() != text.encode():
            stale.append(name)
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what make_captions.py writes; run it again\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
