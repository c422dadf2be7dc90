"""The teacher of dho/fashion_mnist: `mmkd prepare fashion_clip`. This takes sizes too."""

from mmkd.prepare.fashion_clip import main as main

if __name__ == "__main__":
    main()
