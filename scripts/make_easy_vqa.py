"""easy-VQA as rows with images: `mmkd prepare easy_vqa`."""

from mmkd.prepare.easy_vqa import OUTPUT_DIR as OUTPUT_DIR
from mmkd.prepare.easy_vqa import main as main
from mmkd.prepare.easy_vqa import make_easy_vqa as make_easy_vqa

if __name__ == "__main__":
    main()
