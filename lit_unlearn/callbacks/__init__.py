"""What happens around training: closed-form edits, pictures, scores, exports."""
