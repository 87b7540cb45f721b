"""``python -m gyroquant``."""

from gyroquant.cli import main

if __name__ == "__main__":
    main()
