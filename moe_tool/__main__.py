"""Entry point of `python -m moe_tool`."""

from moe_tool.cli.app import main

if __name__ == "__main__":
    main()
