"""The questions of the offline suite: `mmkd prepare eval_data`."""

from mmkd.prepare.eval_data import main as main

if __name__ == "__main__":
    main()
