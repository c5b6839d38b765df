"""Those who are told how a run goes: one file each."""
