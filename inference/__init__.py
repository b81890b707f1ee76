"""Trained models at work: predictor and protocols, backends outside torch, video, report."""
