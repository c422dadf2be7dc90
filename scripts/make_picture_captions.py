"""Pictures with captions: `mmkd prepare picture_captions`. This takes paths too."""

from mmkd.prepare.picture_captions import main as main

if __name__ == "__main__":
    main()
