"""The working tree's speed beside another commit's, case by case: the job behind `make compare`."""
