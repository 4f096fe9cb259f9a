#!/usr/bin/env python3
"""Make every variant that the scheme asks for, once, and write them as one bundle.

python prune.py -m model/t5-small.pth -c conf_prune.json -o modules.npy
python prune.py --method l1 -p model/test.pth
"""

from pathlib import Path

import click

from composable import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.path_option("-c", "--config", default="conf_prune.json", text="Which variants must exist.")
@cli.path_option("-o", "--output", default="modules.npy", text="Bundle to write.")
@cli.path_option(
    "-p", "--test-model", default=None, text="Also compose a model of all first variants."
)
@click.option(
    "--method",
    "preferred",
    multiple=True,
    help="Method for plain rates of the kinds it can prune; others keep their default "
    "(attention: head_l1, linear: l1).",
)
def main(
    model: Path, config: Path, output: Path, test_model: Path | None, preferred: tuple[str, ...]
) -> dict[str, object]:
    """Prune every module at every rate of the scheme; attention heads and weights go for good."""
    from composable import bundle, checkpoint, compose, files, methods, pruning
    from composable.config import read_scheme

    for name in preferred:
        methods.by_name(name)
    files.check_writable(output, test_model)
    dense = checkpoint.load(model)
    dense.require_dense(model, "pruning")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    scheme = read_scheme(config, modules, [method.name for method in methods.METHODS])
    variants = pruning.make_variants(dense, scheme, preferred)
    if test_model:
        # a test model that cannot be is refused before anything is written
        first = {variant.module: variant for variant in reversed(variants)}
        chosen = [variant for variant in variants if first[variant.module] is variant]
        test = compose.compose(dense, compose.without_parts(chosen))
    options = {"preferred": list(preferred), "source": dense.info["source"]}
    bundle.write(output, bundle.Bundle(dense.fingerprint, variants, options))
    report: dict[str, object] = {
        "wrote": str(output),
        "variants": len(variants),
        "modules": len(scheme),
        "bytes": output.stat().st_size,
    }
    if test_model:
        checkpoint.save(test_model, test)
        report["test_model"] = str(test_model)
    return report


if __name__ == "__main__":
    main()
