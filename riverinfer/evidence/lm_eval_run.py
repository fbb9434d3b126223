"""``python -m riverinfer.evidence.lm_eval_run ARGS``: lm-eval's own command, knowing ``--model riverinfer``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run lm-eval's command line on this process's arguments; 2 where lm-eval is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as exc:
        print(f"riverinfer: lm-eval is needed ({exc}); pip install 'riverinfer[eval]'", file=sys.stderr)
        return 2
    import riverinfer.evidence.lm_eval_model  # noqa: F401

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
