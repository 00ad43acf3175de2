"""Claims fixed beforehand, paired statistics, verdicts, the ledger, figures and reports."""
