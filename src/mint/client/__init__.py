"""The SDK. Knows `Service`; `connect` chooses the implementation."""
