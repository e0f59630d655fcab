"""Who plays: teachers read from SB3 archives, students, and the protocol that they share."""
