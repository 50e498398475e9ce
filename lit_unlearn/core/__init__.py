"""The mathematics of the methods: functions of tensors, without models, files or Lightning."""
