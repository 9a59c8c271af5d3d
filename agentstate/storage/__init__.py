"""Where contexts are kept: the contract (`base`), what backends share (`resolve`, `dispatch`), and the backends."""
