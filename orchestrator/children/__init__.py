"""The programs that we start: launched so that they die with us, marked and found again, ended, and their output."""
