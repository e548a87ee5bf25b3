"""From rows to tables, figures, conditions and one page; nothing is measured here."""
