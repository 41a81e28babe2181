"""From a trained network and a volume to a label map, in bounded memory."""
