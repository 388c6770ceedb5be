"""How the condition number develops while a small MoE is pre-trained."""
