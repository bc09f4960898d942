"""Samples with images, video and audio: decoding, lengths, chat."""
