"""What a LLaVA student of Fashion VQA starts from: `mmkd prepare fashion_vqa_models`."""

from mmkd.prepare.fashion_vqa_models import main as main

if __name__ == "__main__":
    main()
