"""`tucker-ops` and `python -m tucker_ops`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; where its packages are missing, say how to get them (exit code 2)."""
    try:
        from tucker_ops.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tucker_ops"):
            raise
        print(f"tucker-ops needs {error.name}: pip install 'tucker_ops[nnunet]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
