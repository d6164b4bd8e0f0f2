"""The program of machines that run none: services come by value, or are importable. It is packed like any other."""

from bigmachine.worker import bare

if __name__ == "__main__":
    bare()
