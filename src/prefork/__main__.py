"""python -m prefork"""

from prefork.cli import main

if __name__ == "__main__":
    main()
