"""RMU: steering hidden states, and the machinery that makes it cheap."""
