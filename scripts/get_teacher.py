"""Real models for the recipes that run on a laptop: `mmkd prepare SmolLM2-135M-Instruct`, or gemma-3-270m."""

from mmkd.prepare.teachers import main as main

if __name__ == "__main__":
    main()
