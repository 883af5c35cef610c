"""The page of `var demo`. What it shows comes from `varcli.load` and the methods of the model that returns."""
