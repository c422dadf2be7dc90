"""What a LLaVA student of easy-VQA starts from: `mmkd prepare easy_vqa_models`."""

from mmkd.prepare.easy_vqa_models import main as main

if __name__ == "__main__":
    main()
