"""One file a command: its options, the calls, the closing report; only here are flags known."""
