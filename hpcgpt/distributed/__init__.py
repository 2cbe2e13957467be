"""The ranks of a job: who they are, how they meet, agree, share results and errors, and stop at the same step."""
