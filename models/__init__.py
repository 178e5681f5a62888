"""What is known about bone: networks, crops, attenuation, evaluation and digital patients."""
