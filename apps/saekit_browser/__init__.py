"""The feature browser: a Streamlit application that `saekit browse` runs. It reads and shows; computing is saekit's."""
