"""`python -m longjax` is the console script `longjax`."""

from longjax import main

if __name__ == '__main__':
  main.run()
