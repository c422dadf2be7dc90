"""Pictures with captions: `mmkd prepare emoji_names`. This takes paths too."""

from mmkd.prepare.emoji_names import main as main

if __name__ == "__main__":
    main()
