"""What an instruction computes from registers, and puts into one."""
