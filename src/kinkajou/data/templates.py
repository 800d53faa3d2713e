"""Chat templates, in the Jinja form that transformers, vLLM and TRL read from a tokenizer's folder.

`{% generation %}` marks what an assistant says, its end token included.  Jinja drops a line break that follows a
`{% block %}`, so one that must stay there is written as an expression.
"""

ALPACA = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

HUMAN_ASSISTANT = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '\n\nHuman: ' }}{{ message.content }}"
    "{% else %}{{ '\n\nAssistant:' }}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)

TEMPLATES = {"alpaca": ALPACA, "human_assistant": HUMAN_ASSISTANT, "plain": PLAIN}
