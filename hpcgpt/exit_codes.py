"""The exit statuses of ``hpcgpt train``, by which the batch script and the requeue policy decide. No torch in here."""

FINISHED = 0  # training is complete
FAILED = 1  # a crash, as any status that is not listed here
USER_MISTAKE = 2  # a user has to correct something; used by every command
AGAIN = 75  # saved before the end: start it again
SUPERSEDED = 76  # another attempt has taken over the run folder
