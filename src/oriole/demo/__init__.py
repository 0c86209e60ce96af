"""The built-in bilingual corpus: one small invented world, told in Chinese and in English."""
