"""What scores a text: classifiers, probes of one's own, explicit words."""
