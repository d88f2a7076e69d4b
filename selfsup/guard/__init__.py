"""What watches over a run: one writer to its folder (`lease`), and no rank that hangs or is gone unnoticed (`watchdog`)."""
