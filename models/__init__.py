"""What a Segmenter is made of: backbones, heads, networks to compare with, logits, files of weights."""
