"""Tasks of reasoning-gym with worked solutions: `mmkd prepare reasoning_gym`."""

from mmkd.prepare.reasoning_tasks import main as main

if __name__ == "__main__":
    main()
