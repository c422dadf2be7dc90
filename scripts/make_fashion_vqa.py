"""Fashion VQA as rows with images: `mmkd prepare fashion_vqa`."""

from mmkd.prepare.fashion_vqa import main as main

if __name__ == "__main__":
    main()
