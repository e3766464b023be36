"""What images are judged by: extractors, their networks and weights, features on disk."""
