"""`python -m offramp`, and so `accelerate launch -m offramp`."""

from offramp.cli import main

if __name__ == "__main__":
    main()
