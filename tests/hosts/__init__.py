"""Real hosts on this one, nothing simulated: reached by SSH (`network`), or lent by a cloud (`ec2`)."""
