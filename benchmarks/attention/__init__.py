"""Paged attention alone: decode, token trees and prefill, beside the machine's limits."""
