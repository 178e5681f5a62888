"""What the compute node does with one CT: volume, segmentation, anatomy, crops, prediction. No web, no listener."""
