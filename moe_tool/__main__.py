"""`python -m moe_tool` is `moe-tool`."""

from moe_tool.cli.app import main

if __name__ == "__main__":
    main()
