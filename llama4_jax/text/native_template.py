"""Our own chat template in Jinja: the dialogue format of `chat.py`, for other programs to render.

A checkpoint that has no template is saved with this one, and nano ships with it. It writes what
`chat.render` writes: no default system message, nothing trimmed, `eom` after tool calls and tool
results and `eot` after every other message, tool calls as a Python list.
"""

TOOL_INSTRUCTIONS = (
    "You can call the functions below. To call one or several, answer with a Python list of "
    'calls with keyword arguments and nothing else, as in [first(text="a"), second(count=2)].'
)

CHAT_TEMPLATE = r"""
{%- macro literal(value) -%}
  {%- if value is none -%}{{ 'None' }}
  {%- elif value is boolean -%}{{ 'True' if value else 'False' }}
  {%- elif value is string -%}{{ value | tojson }}
  {%- elif value is mapping -%}
    {{- '{' -}}
    {%- for key, item in value.items() -%}
      {{- ', ' if not loop.first -}}{{- key | tojson -}}{{- ': ' -}}{{- literal(item) -}}
    {%- endfor -%}
    {{- '}' -}}
  {%- elif value is iterable -%}
    {{- '[' -}}
    {%- for item in value -%}
      {{- ', ' if not loop.first -}}{{- literal(item) -}}
    {%- endfor -%}
    {{- ']' -}}
  {%- else -%}{{ value }}
  {%- endif -%}
{%- endmacro -%}
{%- set searches = ['brave_search', 'wolfram_alpha', 'photogen'] -%}
{%- macro is_word(name) -%}
  {%- if name[:1] != '-' and name.replace('-', '_').isidentifier() -%}yes{%- endif -%}
{%- endmacro -%}
{%- macro body(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is mapping -%}{{ content | tojson }}
  {%- elif content is not none and content is defined -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{{ part.text }}
      {%- elif part.type == 'image' -%}{{ '<|image|>' }}
      {%- else -%}{{ raise_exception('A part of a message is of type text or image.') }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro calls(list) -%}
  {%- set state = namespace(open=false) -%}
  {%- for item in list -%}
    {%- set call = item.function if item.function is defined else item -%}
    {%- if call.arguments is not mapping -%}
      {{- raise_exception('The arguments of a tool call are a mapping.') -}}
    {%- endif -%}
    {%- set values = call.arguments.values() | list -%}
    {%- set is_alone = values | length == 1 and values[0] is string -%}
    {%- if is_alone and call.name == 'code_interpreter' -%}
      {{- ']' if state.open -}}
      {%- set state.open = false -%}
      {{- '<|python_start|>' -}}{{- values[0] -}}{{- '<|python_end|>' -}}
    {%- elif is_alone and call.name in searches and 'query' in call.arguments -%}
      {{- ']' if state.open -}}
      {%- set state.open = false -%}
      {{- call.name -}}{{- '.call(query=' -}}{{- values[0] | tojson -}}{{- ')' -}}
    {%- else -%}
      {{- ', ' if state.open else '[' -}}
      {%- set state.open = true -%}
      {%- for word in call.name.split('.') if not is_word(word) -%}
        {{- raise_exception('A Python list cannot say the name ' ~ call.name ~ '.') -}}
      {%- endfor -%}
      {{- call.name -}}{{- '(' -}}
      {%- set words = namespace(count=0) -%}
      {%- for key, value in call.arguments.items() if is_word(key) -%}
        {{- ', ' if not loop.first -}}{{- key -}}{{- '=' -}}{{- literal(value) -}}
        {%- set words.count = loop.length -%}
      {%- endfor -%}
      {%- if words.count < values | length -%}
        {{- ', ' if words.count -}}{{- '**{' -}}
        {%- for key, value in call.arguments.items() if not is_word(key) -%}
          {{- ', ' if not loop.first -}}{{- key | tojson -}}{{- ': ' -}}{{- literal(value) -}}
        {%- endfor -%}
        {{- '}' -}}
      {%- endif -%}
      {{- ')' -}}
    {%- endif -%}
  {%- endfor -%}
  {{- ']' if state.open -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set rest = messages -%}
{%- set system = none -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set system = messages[0] -%}
  {%- set rest = messages[1:] -%}
{%- endif -%}
{%- if system is not none or tools -%}
  {{- '<|header_start|>system<|header_end|>\n\n' -}}
  {%- set words = body(system.content) if system is not none else '' -%}
  {%- set built_in = (tools or []) | select('string') | list -%}
  {%- set functions = (tools or []) | reject('string') | list -%}
  {%- for name in built_in if name not in searches and name != 'code_interpreter' -%}
    {{- raise_exception(name ~ ' is no built-in tool; give its definition.') -}}
  {%- endfor -%}
  {%- if built_in -%}
    {{- 'Environment: ipython' -}}
    {%- set named = built_in | reject('equalto', 'code_interpreter') | list -%}
    {{- '\nTools: ' ~ named | join(', ') if named -}}
    {{- '\n\n' if words or functions -}}
  {%- endif -%}
  {{- words -}}
  {%- if functions -%}
    {{- '\n\n' if words -}}
    {{- 'TOOL_INSTRUCTIONS\n' -}}
    {%- for tool in functions -%}
      {{- '\n' -}}{{- (tool.function if tool.function is defined else tool) | tojson -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|eot|>' -}}
{%- endif -%}
{%- for message in rest -%}
  {%- set is_result = message.role == 'tool' or message.role == 'ipython' -%}
  {%- if is_result -%}
    {{- '<|header_start|>ipython<|header_end|>\n\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
  {%- elif message.role == 'user' -%}
    {{- '<|header_start|>user<|header_end|>\n\n' -}}
  {%- elif message.role == 'system' -%}
    {{- '<|header_start|>system<|header_end|>\n\n' -}}
  {%- else -%}
    {{- raise_exception('A role is system, user, assistant, tool or ipython.') -}}
  {%- endif -%}
  {{- body(message.content) -}}
  {%- if message.tool_calls -%}{{- calls(message.tool_calls) -}}{%- endif -%}
  {{- '<|eom|>' if is_result or message.tool_calls else '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
{%- endif -%}
""".strip().replace("TOOL_INSTRUCTIONS", TOOL_INSTRUCTIONS)
