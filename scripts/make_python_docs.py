"""The quickstart's corpus: `mmkd prepare python_docs`."""

from mmkd.prepare.python_docs import main as main

if __name__ == "__main__":
    main()
