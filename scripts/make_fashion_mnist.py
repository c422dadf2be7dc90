"""Fashion-MNIST as Parquet: `mmkd prepare fashion_mnist`."""

from mmkd.prepare.fashion_mnist import main as main

if __name__ == "__main__":
    main()
