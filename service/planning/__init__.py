"""From a pending update to its stages.

An update is planned in two parts. ``data_stages`` writes the tokenizer and the packs when the update starts.
The packs determine how many steps each data version takes, so ``training_stages`` writes the rest once the
last pack has succeeded.
"""
